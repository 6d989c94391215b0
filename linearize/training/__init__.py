"""Recovery training: the schedule, the loop, the model under training, its losses, saved states and what is written."""
