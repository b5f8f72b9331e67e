"""How a distillation tells how it goes on: bars on stderr, nothing on stdout."""

import copy

import pytest
from task_rows import WORDS
from tiny import tiny_bert

from hf_fff import DistillationArguments, convert_ffn_to_fff
from hf_fff.training import distil_texts


@pytest.mark.filterwarnings("ignore:the converted model is not calibrated")
@pytest.mark.parametrize("silent", [False, True])
def test_bars(tmp_path, tokenizer, capsys, silent):
    teacher = tiny_bert()
    texts = [f"{WORDS[i % 100]} {WORDS[i * 7 % 100]}" for i in range(200)]
    args = DistillationArguments(
        output_dir=str(tmp_path),
        max_steps=6,
        per_device_train_batch_size=16,
        logging_steps=2,
        save_strategy="no",
        disable_tqdm=silent,
        use_cpu=True,
    )
    distil_texts(convert_ffn_to_fff(teacher, "2x3"), copy.deepcopy(teacher), texts, tokenizer, args)
    told = capsys.readouterr()
    assert told.out == ""
    words = ("distilling: 100%", "6/6", "loss=", "cosine=", "evaluating: 100%")
    assert [word in told.err for word in words] == [not silent] * len(words)
    assert "{" not in told.err and "learning_rate" not in told.err
