"""`qtrain bench checkpoints`: the forms in which one run can be served, side by side."""
