"""Models built on pynn layers."""

from .mlp import MLP, KNNClassifier, Perceptron, RBFNet
from .rnn import Captioner, CharLM, Seq2Seq, SequenceClassifier, SequenceTagger
from .tree import RecursiveNet, TreeClassifier
from .unet import UNet

__all__ = [
    "MLP",
    "Captioner",
    "CharLM",
    "KNNClassifier",
    "Perceptron",
    "RBFNet",
    "RecursiveNet",
    "Seq2Seq",
    "SequenceClassifier",
    "SequenceTagger",
    "TreeClassifier",
    "UNet",
]
