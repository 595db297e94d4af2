"""A part-of-speech tagger: one tag for every word of sentences whose lengths differ as they like.

    python examples/tagger.py                     about ten seconds
    python examples/tagger.py --sentences 800     a smaller training set

Sentences come from the small grammar below, in which many words are ambiguous. "The cold felt": is a noun still to
come, or was "cold" one? "They saw her": is it her or her dog that they saw? Sometimes the words on the left tell,
sometimes those on the right: a network that reads in both directions is compared with one that reads from left to
right, and both with the tag that each word has most often.

The sentences of a batch lie one behind the other (`nbrnn.Ragged`): no padding is computed, and nothing is masked.
"""

import argparse

import numpy as np

import nbrnn

# Short alternatives come first: the first one is taken where a sentence has become deep enough.
GRAMMAR = {
    "S": ["SUBJ VP", "NP VP", "NP VP CONJ S"],
    "NP": ["DET NOUN", "DET ADJ NOUN", "DET ADJ ADJ NOUN", "NP PREP OBJECT", "NP COMP SUBJ VT"],
    "OBJECT": ["OBJ", "NP"],
    "VP": ["VI", "VT OBJECT", "VI ADV", "VT OBJECT ADV", "AUX VB OBJECT", "VP PREP OBJECT", "VS COMP S"],
}
WORDS = {
    "DET": "the a every this that her",
    "ADJ": "old green cold light cut left ground fast",
    "NOUN": "dog river cold light cut saw felt ground shed bit rose spoke cook paint can will",
    "VT": "saw felt ground shed cut bit left met",  # with an object
    "VI": "rose spoke fell left",  # without one
    "VS": "saw felt said",  # with "that" and a sentence
    "VB": "cook paint light see",  # after an auxiliary
    "AUX": "can will",
    "ADV": "fast left early",
    "SUBJ": "they we this that",
    "OBJ": "them her this that",
    "PREP": "near to past",
    "COMP": "that",
    "CONJ": "and but",
}
TAG_OF = {"VT": "VERB", "VI": "VERB", "VS": "VERB", "VB": "VERB", "SUBJ": "PRON", "OBJ": "PRON", "COMP": "CONJ"}
TAGS = sorted({TAG_OF.get(kind, kind) for kind in WORDS})
VOCABULARY = sorted({word for words in WORDS.values() for word in words.split()})


def tags_of(word):
    return {TAG_OF.get(kind, kind) for kind, words in WORDS.items() if word in words.split()}


def expand(symbol, depth, rng):
    """Pairs of a word and its tag."""
    if symbol in WORDS:
        return [(str(rng.choice(WORDS[symbol].split())), TAG_OF.get(symbol, symbol))]
    choice = GRAMMAR[symbol][rng.integers(len(GRAMMAR[symbol])) if depth > 0 else 0]
    return [pair for part in choice.split() for pair in expand(part, depth - 1, rng)]


def sentences(count, rng):
    """Words and tags as two Ragged of integers; no sentence twice."""
    found = {}
    while len(found) < count:
        pairs = expand("S", rng.integers(1, 10), rng)
        found[tuple(pairs)] = [(VOCABULARY.index(word), TAGS.index(tag)) for word, tag in pairs]
    both = nbrnn.Ragged.from_list(list(found.values()))
    return both.with_values(both.values[:, 0]), both.with_values(both.values[:, 1])


def most_frequent(words, tags, unseen):
    """For each word of other sentences, the tag that it has most often."""
    counts = np.zeros((len(VOCABULARY), len(TAGS)), int)
    np.add.at(counts, (words.values, tags.values), 1)
    return counts.argmax(axis=1)[unseen.values]


def learn(words, tags, unseen, bidirectional):
    """A trained tagger, and its tags for other sentences."""
    lstm = nbrnn.LSTM(16, 32, bidirectional=bidirectional, seed=1)
    linear = nbrnn.Linear(32 * lstm.directions, len(TAGS), seed=2)
    model = nbrnn.Sequential(nbrnn.Embedding(len(VOCABULARY), 16, seed=0), lstm, linear)
    trainer = nbrnn.Trainer(model, nbrnn.CrossEntropy(), nbrnn.Adam(0.01), clip_norm=1.0)
    trainer.fit(nbrnn.data.RaggedBatches(words, tags, 32, seed=0), epochs=10)
    y, _ = model(unseen)
    return y.values.argmax(axis=1)


def main():
    parser = argparse.ArgumentParser(description="a tagger that reads in both directions")
    parser.add_argument("--sentences", type=int, default=3000, help="to train on (default: 3000)")
    options = parser.parse_args()
    words, tags = sentences(options.sentences + 1000, np.random.default_rng(0))
    (words, unseen), (tags, truth) = ((part[:-1000], part[-1000:]) for part in (words, tags))
    L, ambiguous = unseen.lengths, np.array([len(tags_of(word)) > 1 for word in VOCABULARY])[unseen.values]
    print(f"{len(words)} sentences to learn from, {len(unseen)} others to be tagged: {L.min()} to {L.max()} words,")
    print(f"{100 * ambiguous.mean():.0f} per cent of which are ambiguous\n")

    print(f"{'per cent right':24}{'all words':>12}{'ambiguous':>12}{'sentences':>12}")
    guesses = {"most frequent tag": most_frequent(words, tags, unseen)}
    for name, bidirectional in {"LSTM, left to right": False, "LSTM, both directions": True}.items():
        guesses[name] = learn(words, tags, unseen, bidirectional)
    for name, guess in guesses.items():
        right = truth.with_values(guess == truth.values)
        whole = np.array([one.all() for one in right])
        shares = right.values.mean(), right.values[ambiguous].mean(), whole.mean()
        print(f"{name:24}" + "".join(f"{100 * share:12.2f}" for share in shares))
        if name == "LSTM, left to right":
            n = np.argmax(~whole & (L == int(np.median(L))))

    print("\none that is not all right from left to right: tags of the grammar, of the three\n")
    for at in range(*unseen.offsets[[n, n + 1]]):
        tag = truth.values[at]
        found = [TAGS[guess[at]] + (" *" if guess[at] != tag else "") for guess in guesses.values()]
        print("".join(f"{cell:12}" for cell in [VOCABULARY[unseen.values[at]], TAGS[tag], *found]).rstrip())


if __name__ == "__main__":
    main()
