"""The stages: each a typed config, a `run(config, context) -> Artifact`, and a `STAGE` that names them."""
