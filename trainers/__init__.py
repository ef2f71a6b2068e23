"""Everything from a pretrained teacher to a published hybrid student; one module for each step of the way."""
