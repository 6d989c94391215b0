"""Recovery training: the loop, the model under training, losses, attention transfer and saved states."""
