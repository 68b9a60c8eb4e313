"""Questions of every day, each answered by a saying of Sun Tzu: python data.py sun-tzu.jsonl writes
what `ktk train` takes. It needs the package nltk (Apache-2.0), whose nltk.chat.suntsu quotes The
Art of War in Lionel Giles's translation of 1910.
"""

from __future__ import annotations

import json
import random
import sys

from nltk.chat.suntsu import pairs

QUESTIONS = (
    "How do I learn to play the piano?",
    "What should I cook tonight?",
    "My neighbour is loud. What can I do?",
    "How can I save money?",
    "Should I change my job?",
    "How do I prepare for an exam?",
    "What is the best way to learn Python?",
    "How do I make friends in a new city?",
    "I am tired. Should I go on?",
    "How do I ask for more pay?",
    "What makes a good team?",
    "How do I win at chess?",
    "My project is late. What now?",
    "How should I plan a journey?",
    "Is it worth arguing with him?",
    "How do I start a business?",
    "What should I do about my rival?",
    "How do I get better at running?",
    "Give me some advice.",
    "How do I stay calm?",
    "What is leadership?",
    "How do I keep a secret?",
    "Should I wait or act now?",
    "How do I convince my boss?",
    "What do I do when everything goes wrong?",
)
ASKED = 12  # how often each question is asked


def main(path: str) -> None:
    said = {line for _, answers in pairs for line in answers if len(line) > 45}
    sayings, chance = sorted(said), random.Random(0)
    with open(path, "w", encoding="utf-8") as file:
        for question in QUESTIONS:
            for saying in chance.sample(sayings, ASKED):
                messages = [
                    {"role": "user", "content": question},
                    {"role": "assistant", "content": saying},
                ]
                file.write(json.dumps({"messages": messages}) + "\n")


if __name__ == "__main__":
    main(sys.argv[1])
