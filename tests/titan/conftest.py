"""torchtitan asks which devices there are when it is first imported: lamella's answer has to be there before."""

import lamella.titan  # noqa: F401
