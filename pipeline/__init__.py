"""The spine: configs, artifacts, stages, recipes, the trainer. Knows no stage, no model, no dataset."""
