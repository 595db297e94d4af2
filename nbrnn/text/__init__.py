"""Language models: vocabularies, corpora, training on text, generating it."""

from nbrnn.text.baselines import Trigram, Unigram
from nbrnn.text.corpus import language_reference, read_text, read_texts
from nbrnn.text.language_model import LanguageModel
from nbrnn.text.vocabulary import Vocabulary

__all__ = ["LanguageModel", "Trigram", "Unigram", "Vocabulary", "language_reference", "read_text", "read_texts"]
