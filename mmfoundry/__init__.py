"""mmfoundry: from raw image-text shards to a released vision-language model, exact at every step."""

__version__ = "0.1.0"
