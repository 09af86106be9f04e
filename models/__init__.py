"""Vision and text towers, CLIP, connectors, vision-language models; objectives, adapters; conversions."""
