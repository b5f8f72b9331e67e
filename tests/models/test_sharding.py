"""Fast models under FSDP2, on the CPU."""

import copy
import os

import pytest
import torch
import torch.distributed as dist
import transformers
from tiny import tiny_model
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from transformers.distributed import DistributedConfig

from hf_fff import convert_ffn_to_fff

pytestmark = pytest.mark.filterwarnings("ignore:the converted model is not calibrated")
HEADS = ["ForSequenceClassification", "ForMaskedLM"]


def batch_for(head, rows=4):
    ids = torch.randint(5, 120, (rows, 9), generator=torch.Generator().manual_seed(0))
    return {"input_ids": ids, "labels": ids if head == "ForMaskedLM" else torch.arange(rows) % 2}


def losses(model, batch, steps=3):
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    seen = []
    for _ in range(steps):
        loss = model(**batch).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        seen.append(loss.detach().clone())
    return torch.stack(seen)


@pytest.fixture
def one_process():
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.mark.parametrize("head", HEADS)
@pytest.mark.parametrize("family", ["bert", "albert", "modernbert"])
def test_fully_shard(one_process, family, head):
    """Layer by layer and the whole, as torch has it: it trains as the model that is not sharded."""
    fast = convert_ffn_to_fff(tiny_model(family, head), "2x3")
    sharded, mesh = copy.deepcopy(fast), dist.init_device_mesh("cpu", (1,))
    for block in dict.fromkeys(sharded.family.blocks(sharded.base_model)):
        fully_shard(block, mesh=mesh)
    fully_shard(sharded, mesh=mesh)
    batch = batch_for(head)
    torch.testing.assert_close(losses(sharded, batch), losses(fast, batch))
    trained = dict(fast.named_parameters())
    for name, p in sharded.named_parameters():
        assert isinstance(p, DTensor)
        torch.testing.assert_close(p.full_tensor(), trained[name].data, rtol=1e-3, atol=1e-4)


def in_two(rank, folder, head):
    """One of two processes, each with half of the batch; transformers shards by the class's plan."""
    torch.set_num_threads(1)
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2"}
    dist.init_process_group("gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=2)
    auto, batch = getattr(transformers, f"AutoModel{head}"), batch_for(head)
    model = auto.from_pretrained(folder, distributed_config=DistributedConfig(fsdp_size=2)).eval()
    assert all(isinstance(p, DTensor) for p in model.parameters())
    got = losses(model, {k: v[2 * rank : 2 * rank + 2] for k, v in batch.items()})
    dist.all_reduce(got)
    torch.testing.assert_close(got / 2, losses(auto.from_pretrained(folder).eval(), batch))
    dist.destroy_process_group()


@pytest.mark.full
@pytest.mark.parametrize("head", HEADS)
def test_sharded_by_transformers(tmp_path, head):
    convert_ffn_to_fff(tiny_model("bert", head), "2x3").save_pretrained(tmp_path)
    torch.multiprocessing.spawn(in_two, (str(tmp_path), head), nprocs=2)


def gathered_in_two(rank, folder, head):
    """``fully_shard`` itself on two processes with half of the batch each: trained, gathered, saved and opened again."""
    torch.set_num_threads(1)
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2"}
    dist.init_process_group("gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=2)
    auto, batch, mesh = getattr(transformers, f"AutoModel{head}"), batch_for(head), dist.init_device_mesh("cpu", (2,))
    alone, model = (auto.from_pretrained(folder).eval() for _ in range(2))
    for block in model.base_model.encoder.layer:
        fully_shard(block, mesh=mesh)
    fully_shard(model, mesh=mesh)
    tree = model.base_model.encoder.layer[0].intermediate
    for p in (tree.weight_in, tree.bias_in, tree.weight_out):
        assert isinstance(p, DTensor) and p.placements[0].is_shard(0)
        assert 0 < len(p.to_local()) < len(p) and len(p) == tree.config.nodes
    assert all(isinstance(p, DTensor) for p in model.parameters())
    got = losses(model, {k: v[2 * rank : 2 * rank + 2] for k, v in batch.items()})
    dist.all_reduce(got)
    want = losses(alone, batch)
    torch.testing.assert_close(got / 2, want, msg=lambda words: f"{words}\nsharded {got / 2}, alone {want}")
    state = get_model_state_dict(model, options=StateDictOptions(full_state_dict=True, cpu_offload=True))
    if rank == 0:
        model.save_pretrained(f"{folder}/gathered", state_dict=state)
        opened = auto.from_pretrained(f"{folder}/gathered")
        assert type(opened) is type(alone)
        for name, p in alone.named_parameters():
            torch.testing.assert_close(opened.get_parameter(name), p, rtol=1e-3, atol=1e-4)
    dist.barrier()
    dist.destroy_process_group()


@pytest.mark.full
@pytest.mark.parametrize("head", HEADS)
def test_gathered_state_opens(tmp_path, head):
    convert_ffn_to_fff(tiny_model("bert", head), "2x3").save_pretrained(tmp_path)
    torch.multiprocessing.spawn(gathered_in_two, (str(tmp_path), head), nprocs=2)
