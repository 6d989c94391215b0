"""The settings that a user can give: the schemas of configs and recipes, and their loading from files and flags."""
