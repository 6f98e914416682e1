"""Whether the models learn: tasks, models of one size, training, and the report of ``run.py``."""
