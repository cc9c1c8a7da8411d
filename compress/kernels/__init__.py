"""Products with packed weights: one layout, and for each backend the code that reads it."""
