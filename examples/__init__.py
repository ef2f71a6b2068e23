"""What a clone needs to run the demo: a real teacher (`smollm2`) and a little text (`text`)."""
