"""What a command that cannot do what it was asked leaves behind."""

import re


def assert_one_line(result, message):
    """``result`` of the fixture ``run``: exit code 2, and one line on stderr that ``message`` (a pattern) is found
    in.
    """
    code, out, err = result
    assert code == 2 and out == ""
    assert err.startswith("efficientnet: error: ") and err.count("\n") == 1 and err.endswith("\n")
    assert re.search(message, err), err
