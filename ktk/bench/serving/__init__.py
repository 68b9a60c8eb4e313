"""Speed of a server of OpenAI's API under load: how long clients wait, and tokens/s."""
