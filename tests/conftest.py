"""What the tests share: one thread, no network, and tokenizers and models of some thousand weights made in memory."""

import os

os.environ["OMP_NUM_THREADS"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"
os.environ["HF_HUB_OFFLINE"] = "1"

import sys
from pathlib import Path

import pytest

EOS, PAD = "<|endoftext|>", "<|pad|>"
ROOT = Path(__file__).resolve().parents[1]


def pytest_configure(config):
    """Only the tests of the GPU see one, and only when they are asked for (pytest -m gpu): the others count to the last bit."""
    if config.option.markexpr != "gpu":
        os.environ["CUDA_VISIBLE_DEVICES"] = ""


@pytest.fixture(autouse=True, scope="session")
def one_thread():
    if "torch" in sys.modules:  # the light tests do without
        sys.modules["torch"].set_num_threads(1)


@pytest.fixture(scope="session")
def shared_data():
    """Public data that stands beside the checkout, where there is any."""
    folder = ROOT.parent / "shared" / "data"
    if not folder.is_dir():
        pytest.skip("needs the public data of ../shared/data, which is not beside this checkout")
    return folder


def byte_level(special=(EOS,), lead=None, **roles):
    """A byte-level BPE of 256 bytes, some merges and the special tokens, which come first; `lead` is put before each text."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    merges = [("h", "e"), ("l", "l"), ("he", "ll"), ("Ġ", "w"), ("o", "r"), ("Ġw", "or")]
    tokens = [*special, *sorted(pre_tokenizers.ByteLevel.alphabet()), *("".join(pair) for pair in merges)]
    tokenizer = Tokenizer(models.BPE(vocab={token: i for i, token in enumerate(tokens)}, merges=merges))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    if lead is not None:
        tokenizer.post_processor = processors.TemplateProcessing(
            single=f"{lead} $A", special_tokens=[(lead, tokens.index(lead))]
        )
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, clean_up_tokenization_spaces=False, **roles)


@pytest.fixture(scope="session")
def tokenizer():
    """Like GPT-2's after PAD has been added: nothing before a text."""
    return byte_level([EOS, PAD], eos_token=EOS, bos_token=EOS, pad_token=PAD)


@pytest.fixture(scope="session")
def opt_tokenizer():
    """Like OPT's: `</s>` is BOS and EOS and stands before each text; `<pad>` is there."""
    return byte_level(["<s>", "<pad>", "</s>"], "</s>", eos_token="</s>", bos_token="</s>", pad_token="<pad>")


@pytest.fixture(scope="session")
def bert_tokenizer(tmp_path_factory):
    """Like that of GPT-2 models with Chinese WordPiece: [CLS] … [SEP] around a text, and no EOS. As a folder."""
    from transformers import BertTokenizer

    folder = tmp_path_factory.mktemp("bert")
    words = "[PAD] [UNK] [CLS] [SEP] [MASK] a b c ##b ##c [ ] sep pad 中 文"
    (folder / "vocab.txt").write_text(words.replace(" ", "\n") + "\n", encoding="utf-8")
    BertTokenizer(str(folder / "vocab.txt")).save_pretrained(folder)
    return folder


def configuration(name, rows):
    """gpt2, opt (word embeddings as wide as the model) or opt-350m (narrower ones, norms after the layers)."""
    from transformers import GPT2Config, OPTConfig

    if name == "gpt2":
        return GPT2Config(
            vocab_size=rows, n_embd=32, n_layer=2, n_head=4, n_positions=64, bos_token_id=0, eos_token_id=0
        )
    return OPTConfig(
        vocab_size=rows,
        hidden_size=32,
        word_embed_proj_dim=16 if name == "opt-350m" else 32,
        do_layer_norm_before=name != "opt-350m",
        ffn_dim=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=64,
        bos_token_id=2,
        eos_token_id=2,
        pad_token_id=1,
    )


def random_model(kind, config, scale=0.15, seed=0):
    """A model with noise on every weight, biases and norms and PAD's row included, so that nothing is right by being 0 or 1."""
    import torch

    torch.manual_seed(seed)
    model = kind.from_config(config)
    with torch.no_grad():
        for weight in model.parameters():
            weight += scale * torch.randn(weight.shape)
    return model.eval()


@pytest.fixture(scope="session")
def checkpoints(tmp_path_factory, tokenizer, opt_tokenizer):
    """Folders of random causal LMs with their tokenizers, by name; OPT's have seven rows that no token has."""
    from transformers import AutoModelForCausalLM

    folders = {}
    for name in ("gpt2", "opt", "opt-350m"):
        own = tokenizer if name == "gpt2" else opt_tokenizer
        folders[name] = tmp_path_factory.mktemp(name)
        rows = len(own) + (0 if name == "gpt2" else 7)
        random_model(AutoModelForCausalLM, configuration(name, rows), seed=1).save_pretrained(folders[name])
        own.save_pretrained(folders[name])
    return folders
