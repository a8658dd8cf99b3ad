"""What an answer is worth: reward models, classifiers, functions."""
