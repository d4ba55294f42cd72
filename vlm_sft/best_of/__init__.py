"""Sample several answers to each question of training data, and keep the best."""
