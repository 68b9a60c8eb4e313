"""Text from models: what a path holds, opening it, sessions, sampling, engines that batch."""
