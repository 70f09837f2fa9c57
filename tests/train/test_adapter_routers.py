"""Where routers of adapters start, and what beginning with an adapter means."""

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM

from lamella.train.adapter_routers import MARGIN, ridge_rows
from lamella.train.adapter_steps import Pace, mean_nats, read_step, samples_of
from lamella.train.adapters import learn_adapter
from support.adapters import IDS, VARIANTS, logits, save_adapter
from support.models import VOCAB, save_llama


def test_ridge_rows_name_the_text_of_a_token():
    generator = torch.Generator().manual_seed(0)
    centres_ED, own_T = torch.randn(3, 12, generator=generator), torch.arange(300) % 2
    x_TD = centres_ED[own_T] + 0.3 * torch.randn(300, 12, generator=generator)
    rows_ED = ridge_rows(x_TD, own_T, 3)
    logits_TE = x_TD @ rows_ED.T
    assert (logits_TE.argmax(1) == own_T).float().mean() > 0.98
    own = logits_TE.gather(1, own_T[:, None]).mean()
    others = (logits_TE.sum() / 300 - own) / 2
    assert own - others == pytest.approx(MARGIN, rel=1e-4)
    flipped_ED = ridge_rows(-x_TD, own_T, 3)  # no intercept: what is turned around is turned around
    torch.testing.assert_close(flipped_ED, -rows_ED, atol=1e-4, rtol=1e-4)


def test_the_loss_in_chunks_is_that_of_the_logits(tmp_path):
    model = AutoModelForCausalLM.from_pretrained(save_llama(tmp_path / "dense"))
    ids, labels = torch.randint(VOCAB, (2, 160)), torch.randint(VOCAB, (2, 160))
    labels[0, 3] = labels[1, 150] = -100
    nats = mean_nats(model, ids, labels)
    whole = torch.nn.functional.cross_entropy(model(ids).logits.flatten(0, 1), labels.flatten())
    torch.testing.assert_close(nats, whole, atol=1e-6, rtol=1e-6)
    weight = model.get_input_embeddings().weight
    (found,), (direct,) = (torch.autograd.grad(loss, weight) for loss in (nats, whole))
    torch.testing.assert_close(found, direct, atol=1e-6, rtol=1e-4)


def test_what_others_have_read_is_passed_over(tmp_path):
    save_llama(tmp_path / "dense")
    (tmp_path / "text.txt").write_text("".join(f"line {i} of a text\n" for i in range(400)))
    source, model = str(tmp_path / "text.txt"), str(tmp_path / "dense")
    first, later = Pace(2, 1e-3, 2, 16), Pace(2, 1e-3, 2, 16, skip=2)
    texts = [samples_of(source, model, first)]
    assert torch.equal(read_step(texts, later, 0).ids_BL, read_step(texts, first, 1).ids_BL)
    assert not torch.equal(read_step(texts, first, 0).ids_BL, read_step(texts, first, 1).ids_BL)


def test_a_rate_that_others_go_on_from_does_not_fall():
    pace = Pace(40, 1e-3, falls=False)
    assert [pace.factor(step) for step in (0, 3, 20, 39)] == [0.25, 1.0, 1.0, 1.0]
    assert Pace(40, 1e-3).factor(39) == pytest.approx(0.1, abs=0.01)


@pytest.mark.slow
def test_an_adapter_begins_as_the_one_that_it_is_given(tmp_path):
    dense = save_llama(tmp_path / "dense")
    (tmp_path / "text.txt").write_text("".join(f"line {i} of a text\n" for i in range(400)))
    given = save_adapter(dense, tmp_path / "given", **VARIANTS["patterns"])
    pace = Pace(1, 1e-12, 1, 16)
    learn_adapter(str(dense), [str(tmp_path / "text.txt")], tmp_path / "new", rank=6, alpha=3.0, start=given, pace=pace)
    both = (
        PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(dense), folder).eval()
        for folder in (given, tmp_path / "new")
    )
    torch.testing.assert_close(*(logits(model, IDS % VOCAB) for model in both), atol=2e-5, rtol=1e-4)
