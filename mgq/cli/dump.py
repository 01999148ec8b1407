def dump():
    "x"
