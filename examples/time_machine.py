"""The character language model of d2l.ai, chapter 9: 10,000 characters, 500 epochs, perplexity close to 1.

    python examples/time_machine.py                                     the language reference of CPython
    python examples/time_machine.py timemachine.txt --cell gru          The Time Machine, or any other text

One recurrent layer of 256 units, 35 steps by 32 rows, SGD with learning rate 1, gradients clipped to norm 1.
Published for The Time Machine: RNN 1.0 to 1.5, GRU 1.0 to 1.1, LSTM 1.1 to 1.3.
"""

import argparse
import math
import re
import statistics

from nbrnn.text import LanguageModel, Vocabulary, language_reference, read_text
from nbrnn.training.optimizers import SGD


def clean(text: str) -> str:
    """Letters and single spaces in lower case; lines follow each other without a separator, as in the book."""
    return "".join(re.sub("[^A-Za-z]+", " ", line).strip().lower() for line in text.splitlines())


def main() -> None:
    parser = argparse.ArgumentParser(description="the character language model of d2l.ai, chapter 9")
    parser.add_argument("text", nargs="?", help="a text file (default: the language reference of CPython)")
    parser.add_argument("--cell", choices=["rnn", "gru", "lstm"], help="one cell (default: all three)")
    parser.add_argument("--windows", choices=["random", "sequential"], help="one way to cut batches (default: both)")
    parser.add_argument("--epochs", type=int, default=500)
    options = parser.parse_args()

    text = clean(read_text(options.text) if options.text else language_reference())
    vocabulary = Vocabulary.from_text(text)
    tokens = vocabulary.encode(text)[:10_000]
    for cell in [options.cell] if options.cell else ["rnn", "gru", "lstm"]:
        for windows in [options.windows] if options.windows else ["random", "sequential"]:
            model = LanguageModel(vocabulary, cell=cell, hidden_size=256, seed=0)
            fitted = model.fit(tokens, epochs=options.epochs, optimizer=SGD(1.0), windows=windows, seed=0)
            history = fitted.to_dict()
            perplexity, speed = math.exp(history["loss"][-1]), statistics.median(history["items_per_second"])
            print(f"{cell}, {windows} windows: perplexity {perplexity:.2f}, {speed:,.0f} tokens/s")
            for prompt in ["time traveller", "traveller"]:
                print(f"    {prompt}{model.generate(prompt, 50, greedy=True)}")


if __name__ == "__main__":
    main()
