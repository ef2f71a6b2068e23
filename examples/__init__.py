"""What a clone needs to run the demo: a real teacher and a little text."""
