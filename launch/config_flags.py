"""Makes flags of the fields of a configuration, so that a new field is a flag of every program that uses it."""

from collections.abc import Collection
from typing import Any

from absl import flags

from bn_keras.settings import Configuration, fields_of
from bn_keras.training.recipes import RECIPES

flags.disclaim_key_flags()  # the flags belong to the program that calls

_OF_RECIPE = {name for recipe in RECIPES.values() for name in recipe}


def define(
    configuration: type[Configuration],
    names: Collection[str] | None = None,
    *,
    flag_values: flags.FlagValues = flags.FLAGS,
) -> None:
    """Defines a flag for each field whose value a person chooses. A flag that is not given is None.

    Args:
      configuration: the class whose fields become flags.
      names: the names of the fields; None for all.
      flag_values: the flags to add them to.
    """
    for name, field in fields_of(configuration).items():
        if not field.setting.given or (names is not None and name not in names):
            continue
        its, arguments = field.setting, dict[str, Any](flag_values=flag_values)
        said = (its.above, its.below) == (None, None) and (its.choices is None or field.type is str)
        bounds = "" if said else f" It is {its.range()}."  # absl adds bounds that include their ends itself
        help = f"{its.help}{bounds} Default: {_default(name, field)}."
        if its.rows is not None:
            flags.DEFINE_enum(name, None, list(its.rows), its.help, required=True, **arguments)
        elif its.choices is not None and field.type is str:
            flags.DEFINE_enum(name, None, list(its.choices), help, **arguments)
        elif field.type is bool:
            flags.DEFINE_boolean(name, None, help, **arguments)
        elif field.type is str:
            flags.DEFINE_string(name, None, help, **arguments)
        else:
            numbers: dict[type, Any] = {int: flags.DEFINE_integer, float: flags.DEFINE_float}
            numbers[field.type](name, None, help, its.low, its.high, **arguments)


def given(configuration: type[Configuration], *, flag_values: flags.FlagValues = flags.FLAGS) -> dict[str, Any]:
    """The values of the flags that were given, without those that name a row of a table."""
    values = {
        name: flag_values[name].value
        for name, field in fields_of(configuration).items()
        if name in flag_values and field.setting.given and field.setting.rows is None
    }
    return {name: value for name, value in values.items() if value is not None}


def _default(name, field):
    if field.of_row:
        return "the variant's"
    if name in _OF_RECIPE or field.default is None:
        return "the recipe's"
    return {"": "none"}.get(field.default, field.default)
