"""Image scores against a loop over the tokens, and the scores of features by hand."""

import numpy as np
import pytest
import torch
from files import write_activations
from pages import write_block

from analysis.concepts import (
    auroc,
    clearest_exchange,
    contrast,
    find_features,
    image_scores,
    saeuron,
    toward,
    with_word,
)
from bench.concepts import best_features
from sae import Sae
from store.activation_file import read_prompts
from store.dataset import Activations


@pytest.mark.parametrize("pool", ["mean", "max"])
@pytest.mark.parametrize("activation", ["topk", "sampletopk"])
def test_image_scores(tmp_path, pool, activation):
    """The scores are those of a loop over images, steps and tokens."""
    x = np.random.default_rng(0).standard_normal((3, 2, 5, 8)).astype(np.float16)
    np.save(tmp_path / "x.npy", x)
    sae = Sae(8, 12, 3, {"activation": activation})
    scores, chosen = image_scores(sae, Activations([tmp_path / "x.npy"]), pool)
    assert scores.shape == (3, 2, 12)
    assert chosen.tolist() == [0, 1, 2]
    for p in range(3):
        for s in range(2):
            tokens = torch.from_numpy(x[p, s]).float()
            acts, where = sae.encode(tokens[None] if activation == "sampletopk" else tokens)[:2]
            codes = torch.zeros(5, 12)
            for t in range(5):
                for a, i in zip(acts.reshape(5, -1)[t], where.reshape(5, -1)[t]):
                    codes[t, i] += a
            assert torch.allclose(
                scores[p, s], codes.mean(0) if pool == "mean" else codes.amax(0), atol=1e-5
            )
    few, chosen = image_scores(sae, Activations([tmp_path / "x.npy"]), pool, most=48)
    assert len(few) == 2
    assert torch.equal(few, scores[chosen])
    with pytest.raises(ValueError, match=r"expected \(prompts, steps, tokens, 9\)"):
        image_scores(Sae(9, 12, 3), Activations([tmp_path / "x.npy"]))


def test_padding_of_text_does_not_count(tmp_path):
    x = np.random.default_rng(0).standard_normal((2, 2, 5, 8)).astype(np.float32)
    x[0, :, 3:] = 0
    write_block(tmp_path, x, stream="text")
    np.save(tmp_path / "block.lengths.npy", np.array([3, 5]))
    sae = Sae(8, 12, 3)
    sae.b_dec.data.fill_(0.3)  # so that zeros would have activations
    for pool, of in (("mean", lambda codes: codes.mean(0)), ("max", lambda codes: codes.amax(0))):
        scores, _ = image_scores(sae, Activations([tmp_path / "block.npy"]), pool)
        for p, tokens in enumerate((3, 5)):
            acts, where = sae.encode(torch.from_numpy(x[p, 1, :tokens]))
            assert torch.allclose(
                scores[p, 1], of(torch.zeros(tokens, 12).scatter(1, where, acts)), atol=1e-5
            )


def test_the_direction_from_one_concept_to_another():
    sae = Sae(6, 3, 2)
    scores = torch.tensor([[[4.0, 1.0, 0.0]], [[0.0, 2.0, 1.0]], [[9.0, 9.0, 9.0]]])
    has = torch.tensor([True, False, False])
    away = torch.tensor([False, True, False])
    assert torch.allclose(
        toward(sae, scores, has, away), torch.nn.functional.normalize(4 * sae.W_dec[0], dim=0)
    )
    expected = torch.nn.functional.normalize(sae.W_dec[1] + sae.W_dec[2], dim=0)
    assert torch.allclose(toward(sae, scores, away, has), expected)
    with pytest.raises(ValueError, match="no picture without the other"):
        toward(sae, scores, has & away, has)


def test_prompts_that_are_damaged(tmp_path):
    path = write_block(tmp_path, np.zeros((2, 1, 3, 4), np.float32))
    assert [row["seed"] for row in read_prompts(path)] == [0, 1]
    for text, message in (
        ('{"prompt": "a"}\n{"pro', "is damaged"),
        ('{"prompt": "a"}\n', "does not say"),
        ("3\n4\n", "does not say"),
    ):
        (tmp_path / "prompts.jsonl").write_text(text)
        with pytest.raises(ValueError, match=message):
            read_prompts(path)


def test_saeurons_score_by_hand():
    # three pictures, a step
    scores = torch.tensor([[[3.0, 1.0, 0.0]], [[1.0, 1.0, 2.0]], [[0.0, 2.0, 2.0]]])
    has = torch.tensor([True, True, False])
    expected = torch.tensor([[2 / 4 - 0, 1 / 4 - 1 / 2, 1 / 4 - 1 / 2]])
    assert torch.allclose(saeuron(scores, has), expected, atol=1e-6)
    assert find_features(scores, has, "saeuron", 1)[0].tolist() == [0]


@pytest.mark.parametrize("how", ["contrast", "saeuron"])
def test_features_that_do_not_tell_a_concept_are_left_out(how):
    """Feature 0 is active with it, 1 without it, 2 never, and 3 with it and more often."""
    has = torch.tensor([True, True, False, False])
    scores = torch.tensor(
        [[2.0, 0, 0, 4], [3.0, 1, 0, 4], [0.0, 4, 0, 0], [1.0, 5, 0, 1]]
    ).unsqueeze(1)
    features, values = find_features(scores, has, how, 4)
    assert features.tolist() == [3, 0]
    assert (values > 0).all()
    features, values = find_features(scores[:, :, 1:3], has, how, 2)
    assert features.tolist() == []
    assert values.tolist() == []


def test_contrast_by_hand():
    scores = torch.tensor([[4.0, 1.0], [6.0, 1.0], [1.0, 2.0], [3.0, 2.0]])
    scores_of_features = contrast(scores, torch.tensor([True, True, False, False]))
    assert scores_of_features[0] == pytest.approx(3 / 1, rel=1e-2)
    assert scores_of_features[1] < 0


def test_auroc_against_all_pairs():
    rng = torch.Generator().manual_seed(0)
    # with ties
    scores = torch.randint(0, 4, (30, 7), generator=rng).float()
    has = torch.rand(30, generator=rng) < 0.3
    a = scores[has][:, None]
    b = scores[~has][None]
    expected = ((a > b).double() + 0.5 * (a == b).double()).mean((0, 1))
    assert torch.allclose(auroc(scores, has).double(), expected)


def test_a_feature_is_chosen_on_one_half_and_scored_on_the_other():
    has = torch.tensor([1, 0] * 20).bool()
    choice = torch.arange(40) % 4 < 2
    # tells it where it is chosen, and says the contrary elsewhere
    lucky = torch.where(choice, has.float(), 1 - has.float())
    scores = [
        torch.rand(40, 3, generator=torch.Generator().manual_seed(0)),
        torch.stack([torch.zeros(40), lucky], 1),
    ]
    assert best_features(scores, has, choice) == (1, 1, 0.0)


def test_words():
    """Whole words count, in any case; a word that all prompts have, or none, is refused."""
    prompts = ["a Star, red", "starry night", "a moon"]
    assert with_word(prompts, "star").tolist() == [True, False, False]
    assert with_word(prompts, "a moon").tolist() == [False, False, True]
    with pytest.raises(ValueError, match="concept 'sun': none of the 3 prompts"):
        with_word(prompts, "sun")
    with pytest.raises(ValueError, match="all of the 2 prompts"):
        with_word(["a star", "the star"], "star")


def test_the_clearest_exchange_is_of_two_words_that_exclude_each_other():
    """Features 0, 1 and 2 tell red, blue and big; big stands with both colours, so it is out."""
    colours = ["red", "blue", "green"] * 8
    prompts = [
        f"a {'big' if i % 2 else 'small'} {colour} thing" for i, colour in enumerate(colours)
    ]
    noise = torch.rand(24, 2, 4, generator=torch.Generator().manual_seed(0))
    scores = 0.1 * noise
    for feature, word, strength in ((0, "red", 1.0), (1, "blue", 2.0), (2, "big", 9.0)):
        scores[:, :, feature] += strength * with_word(prompts, word).float()[:, None]
    words = clearest_exchange(scores, [prompt.replace("small ", "") for prompt in prompts], 1)
    assert words == ("blue", "red")
    assert clearest_exchange(scores[:6], prompts[:6], 1) is None  # no word is in 8 prompts
    assert clearest_exchange(noise, prompts, 1) is None  # nothing tells the words


def test_the_padding_of_texts_takes_no_k_of_a_sample_topk(tmp_path):
    """Zeros have activations where b_enc is positive, and shared the k of the sample."""
    x = np.random.default_rng(0).standard_normal((3, 2, 6, 8)).astype(np.float32)
    lengths = np.array([4, 6, 0])
    for image, length in zip(x, lengths):
        image[:, length:] = 0
    write_activations(tmp_path / "block.npy", x, stream="text", lengths=lengths)
    sae = Sae(8, 12, 3, {"activation": "sampletopk"})
    sae.encoder.bias.data.fill_(2.0)
    scores, _ = image_scores(sae, Activations([tmp_path / "block.npy"]))
    acts, indices = sae.encode(torch.from_numpy(x[0, :, :4]))[:2]
    expected = torch.zeros(2, 12).scatter_add_(1, indices.flatten(1), acts.flatten(1)) / 4
    assert torch.allclose(scores[0], expected, atol=1e-5)
    assert not scores[2].any()
