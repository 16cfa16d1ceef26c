"""Chat templates that can be read in the 19 symbols of the tiny tokenizer: "#" starts a message, then its role."""

TEMPLATE = (
    "{% for m in messages %}#{% if m.role == 'system' %}0{% elif m.role == 'user' %}1{% else %}2{% endif %};"
    "{{ m.content }}{% endfor %}{% if add_generation_prompt %}#2;{% endif %}"
)
# "-+" is an empty thought; "..." stands before it where the variable `effort` asks for it.
THINKING_TEMPLATE = TEMPLATE.replace(
    "#2;{% endif %}",
    "#2;{% if effort is defined %}{{ '.' * effort }}{% endif %}"
    "{% if enable_thinking is defined and not enable_thinking %}-+{% endif %}{% endif %}",
)
# As the templates of Llama 2 and of the first Mistral models: what asks for a reply belongs to the user's message.
BRACKETS = "{% for m in messages %}{% if m.role == 'user' %}1;{{ m.content }}#{% else %}{{ m.content }}.{% endif %}{% endfor %}"


def encode(text: str) -> list[int]:
    """The tiny tokenizer's table, by hand: three special ids, then the characters in this order."""
    return ["0123456789+-=;#.".index(character) + 3 for character in text]
