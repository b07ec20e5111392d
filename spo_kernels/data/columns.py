"""Names of columns, by what is trained."""

# What a sample is made of, beside the columns of a loss's inputs.
COLUMNS = {
    "sft": ("prompt", "completion", "messages", "system", "tools", "chat_template_kwargs"),
    "preference": ("prompt", "chosen", "rejected", "system", "tools", "chat_template_kwargs"),
}
RESPONSES = {"sft": ("completion",), "preference": ("chosen", "rejected")}
