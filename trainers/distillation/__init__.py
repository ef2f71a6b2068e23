"""The trainer of students: stages, losses, stored teachers, checkpoints, what it shows while it runs."""
