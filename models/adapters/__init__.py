"""Ways to change a trained model by little: what is added, how it is saved, how it is merged."""
