"""The recipe: one strict YAML file that says what a run does."""
