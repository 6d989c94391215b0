"""What a user may say: the schemas of configs and recipes, and how they are loaded."""
