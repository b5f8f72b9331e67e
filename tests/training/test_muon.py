"""Steps by Muon: as torch's own takes them, of which matrices, at which rates, and after an interruption."""

import copy

import pytest
import torch
from accelerate import Accelerator
from test_distillation import pair, trainer
from torch import nn

from hf_fff import FFFConfig
from hf_fff.training import arguments_for
from hf_fff.training.muon import orthogonal, take_orthogonal_steps


def model():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(24, 24), nn.Linear(24, 24, bias=False), nn.Linear(24, 60), nn.Linear(60, 24))


def test_steps_are_those_of_torch():
    """Of matrices of any shape, some without gradients at times; the optimizer's own for all else."""
    ours, theirs = model(), model()
    chosen = [ours[i].weight for i in (0, 1, 2, 3)]
    others = {"params": [*chosen[2:], ours[0].bias], "weight_decay": 0.0}
    adam = torch.optim.AdamW([{"params": chosen[:2], "weight_decay": 0.1}, others], lr=0.01)
    take_orthogonal_steps(adam, chosen)
    muon = torch.optim.Muon(
        [
            {"params": [theirs[0].weight, theirs[1].weight], "weight_decay": 0.1},
            {"params": [theirs[2].weight, theirs[3].weight], "weight_decay": 0.0},
        ],
        lr=0.01,
        adjust_lr_fn="match_rms_adamw",
    )
    beside = torch.optim.AdamW([theirs[0].bias], lr=0.01, weight_decay=0.0)
    for step in range(6):
        for m in (ours, theirs):
            torch.manual_seed(step)
            for name, p in m.named_parameters():
                p.grad = torch.randn_like(p) if (step, name) != (2, "1.weight") else None
        given = [p.grad for p in ours.parameters()]
        adam.step(), muon.step(), beside.step()
        assert all(p.grad is g for p, g in zip(ours.parameters(), given, strict=True))  # nothing else sees a difference
        for group in (*adam.param_groups, *muon.param_groups, *beside.param_groups):
            group["lr"] *= 0.8  # as a schedule does
    for i in range(4):
        moved, length = ours[i].weight - model()[i].weight, (theirs[i].weight - model()[i].weight).norm()
        assert (ours[i].weight - theirs[i].weight).norm() < 0.04 * length and moved.norm() > 0.9 * length  # bfloat16
    torch.testing.assert_close(ours[0].bias, theirs[0].bias)
    assert set(adam.state[ours[0].weight]) == {"momentum_buffer", "step"} and "exp_avg" in adam.state[ours[0].bias]


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
@pytest.mark.parametrize("shape", [(3, 40, 40), (2, 20, 50), (2, 50, 20)])
def test_directions_count_alike(shape, device):
    torch.manual_seed(0)
    matrices = (torch.randn(shape) * torch.logspace(-3, 0, shape[2])).to(device)
    u, _, v = torch.linalg.svd(matrices, full_matrices=False)
    near, spread = orthogonal(matrices), torch.linalg.svdvals(orthogonal(matrices))
    assert near.dtype == torch.float32 and spread.amax() < 1.4 and spread.quantile(0.3) > 0.5
    assert ((u @ v) * near).sum() > 0.9 * near.norm() * (u @ v).norm()


def test_which_matrices_and_rates(tmp_path):
    """Attention's alone, where all FFNs are replaced; rates of the rest are half as far from the other one."""
    student, dense = pair("2x3")
    t = trainer(tmp_path, student, dense, muon=True, learning_rate=2e-3, fff_learning_rate=None)
    before = copy.deepcopy(student.state_dict())
    t.train()
    state, named = t.optimizer.state, dict(student.named_parameters())
    by_muon = {name for name, p in named.items() if set(state.get(p, ())) == {"momentum_buffer", "step"}}
    linear = {f"{n}.weight" for n, m in student.named_modules() if isinstance(m, nn.Linear) and "pooler" not in n}
    assert by_muon == linear and by_muon and all("attention" in name for name in by_muon)
    assert all((named[name] != before[name]).any() for name in by_muon)
    assert not any("exp_avg" in state[named[name]] for name in by_muon)
    assert [g["initial_lr"] for g in t.optimizer.param_groups] == [2e-3, 0.375 * 2e-3]


def test_rates_by_default(tmp_path):
    def rates(task=None, **options):
        found = arguments_for(task, output_dir=str(tmp_path), use_cpu=True, **options)
        return [found.learning_rate, found.rate_of("tree"), found.rate_of("mlp")]

    assert rates(max_steps=2000) == pytest.approx([4e-4, 3e-4, 2.4e-3])
    assert rates(max_steps=2000, muon=True) == pytest.approx([8e-4, 3e-4, 2.4e-3])
    assert rates(max_steps=2000, muon=True, fff_units=False) == pytest.approx([8e-4, 4e-4, 4e-4])
    assert rates(max_steps=50, muon=True) == pytest.approx([8e-5, 3e-5, 2.4e-4])
    assert rates(max_steps=50, muon=True, learning_rate=1e-3) == pytest.approx([1e-3, 3.75e-4, 3e-3])
    assert rates("classification", max_steps=2000) == pytest.approx([2e-4, 1.5e-4, 5e-4])  # MLPs in units


def test_rates_in_words(tmp_path):
    found = arguments_for(None, output_dir=str(tmp_path), use_cpu=True, max_steps=2000)
    kinds = {"8x8": 3e-4, "mlp:4": 2.4e-3, "none": 3e-4, "2x2+mlp:4": "0.0003 and 0.0024"}
    for text, rates in kinds.items():
        told = found.rates_of([FFFConfig.from_shorthand(text)])
        assert told == rates if isinstance(rates, str) else told == pytest.approx(rates)


def test_resumed_as_if_not_interrupted(tmp_path):
    def trained(name, resume=None, muon=True):
        student, dense = pair("2x3")
        often = {"max_steps": 6, "save_strategy": "steps", "save_steps": 3}
        trainer(tmp_path / name, student, dense, muon=muon, **often).train(resume_from_checkpoint=resume)
        return student.state_dict()

    whole, half = trained("a"), str(tmp_path / "a" / "checkpoint-3")
    again = trained("b", half)
    assert all(torch.equal(whole[name], value) for name, value in again.items())
    with pytest.raises(ValueError, match="muon is True there"):
        trained("c", half, muon=False)


def test_not_of_shards(tmp_path, monkeypatch):
    from hf_fff.training import DistillationTrainer

    begin = DistillationTrainer.create_accelerator_and_postprocess

    def sharded(self):
        begin(self)
        self.is_fsdp_enabled = True

    monkeypatch.setattr(DistillationTrainer, "create_accelerator_and_postprocess", sharded)
    student, dense = pair("2x3")
    with pytest.raises(ValueError, match="muon=True is not for FSDP"):
        trainer(tmp_path, student, dense, muon=True)


def test_adapters_and_float16_are_refused(tmp_path, monkeypatch):
    student, dense = pair("2x3")
    student.peft_config = {}
    with pytest.raises(ValueError, match="muon=True is not for adapters"):
        trainer(tmp_path, student, dense, muon=True)
    del student.peft_config
    monkeypatch.setattr(Accelerator, "mixed_precision", "fp16")  # however it was asked for
    with pytest.raises(ValueError, match="muon=True is not for fp16"):
        trainer(tmp_path, student, dense, muon=True)


@pytest.mark.parametrize("optim", ["adagrad", "sgd", "adafactor"])
def test_beside_any_optimizer(tmp_path, optim):
    """Some have a state for each parameter before the first step."""
    student, dense = pair("2x3")
    t = trainer(tmp_path, student, dense, muon=True, optim=optim, max_steps=2)
    before = copy.deepcopy(student.state_dict())
    t.train()
    name = "encoder.layer.0.attention.self.query.weight"
    assert "momentum_buffer" in t.optimizer.state[dict(student.named_parameters())[name]]
    assert (student.state_dict()[name] != before[name]).any()


def test_ffns_that_are_left(tmp_path):
    """Are matrices as attention's are."""
    student, dense = pair({0: "2x3"})
    t = trainer(tmp_path, student, dense, muon=True, max_steps=1)
    t.train()
    named = dict(student.named_parameters())
    by_muon = {name for name, p in named.items() if "momentum_buffer" in t.optimizer.state.get(p, ())}
    assert "encoder.layer.1.intermediate.dense.weight" in by_muon and "encoder.layer.1.output.dense.weight" in by_muon
    assert not any("embeddings" in name or "ffn" in name or "weight_out" in name for name in by_muon)
