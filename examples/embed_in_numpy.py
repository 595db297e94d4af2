"""A trained layer inside a NumPy pipeline: embed a batch of sentences of different lengths, then compare them."""

import numpy as np

import nbrnn

sentences = ["the cat sat on the mat", "the cat sat on a mat", "stocks fell sharply"]
lengths = np.array([len(sentence) for sentence in sentences])
letters = np.zeros((lengths.max(), len(sentences)), np.int32)  # (T, B), shorter rows padded with zeros
for column, sentence in enumerate(sentences):
    letters[: lengths[column], column] = np.frombuffer(sentence.encode(), np.uint8)

layer = nbrnn.GRU(128, 64, bidirectional=True, seed=0)  # any saved weights: layer.load_state_dict(mapping)
_, state = layer(letters, lengths=lengths)  # state (2, B, 64): the end of each row, whatever its length
vectors = np.concatenate(state, axis=1)
vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
print(np.round(vectors @ vectors.T, 2))
