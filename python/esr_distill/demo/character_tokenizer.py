"""The demo's tokenizer: 19 symbols, one per character, in the format that `AutoTokenizer.from_pretrained` reads."""

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

SPECIAL_TOKENS = ("<pad>", "<bos>", "<eos>")
# No task writes the full stop. It makes the vocabulary odd (19), the size that tiled kernels get wrong first.
CHARACTERS = "0123456789+-=;#."


def make_character_tokenizer(max_length: int = 512) -> PreTrainedTokenizerFast:
    """A tokenizer with ids 0 `<pad>`, 1 `<bos>`, 2 `<eos>`, then one id per character of `CHARACTERS`.

    `tokenizer(text)` puts `<bos>` in front and no `<eos>` behind; padding goes on the left. A character outside the
    vocabulary raises: there is no unknown token. `tokenizer.decode(ids, skip_special_tokens=True)` gives the text back
    unchanged.
    """
    vocabulary = {token: index for index, token in enumerate((*SPECIAL_TOKENS, *CHARACTERS))}
    backend = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    backend.post_processor = processors.TemplateProcessing(
        single="<bos> $A", pair="<bos> $A $B", special_tokens=[("<bos>", vocabulary["<bos>"])]
    )
    backend.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        pad_token="<pad>",
        bos_token="<bos>",
        eos_token="<eos>",
        padding_side="left",
        model_max_length=max_length,
        clean_up_tokenization_spaces=False,
    )
