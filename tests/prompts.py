"""What the small tokenizer of the tests is trained on."""

PROMPTS = ("两只拟人化的猫，在舞台上激烈地打拳击！", "A red circle moves right, slowly.")  # noqa: RUF001
