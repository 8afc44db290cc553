"""Every message of the package, or those that hold some words; docs/troubleshooting.md explains the most frequent.

python scripts/list_errors.py
python scripts/list_errors.py cache omega       # those that hold both words
"""

import sys
from pathlib import Path

from pages.messages import messages

PACKAGE = Path(__file__).resolve().parents[1] / "hf_rfa"


def main(words: list[str]) -> None:
    for message in messages(PACKAGE):
        if all(word.lower() in f"{message.kind} {message.text}".lower() for word in words):
            print(f"{message.kind} ({message.file}, {message.place})\n    {message.text}\n")


if __name__ == "__main__":
    main(sys.argv[1:])
