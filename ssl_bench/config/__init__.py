"""From words to objects.

`build` checks and constructs, `signatures` reads constructors, `fields` holds their types, `typed`
finds keys that were typed in vain, `messages` puts Hydra's errors in one line, `renamed` knows
where constructors used to lie.
"""
