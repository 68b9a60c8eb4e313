"""What ``ktk demo`` runs: a real model cut into experts, a text, and the comparison on it."""
