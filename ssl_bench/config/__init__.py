"""From words to objects: `build` checks and constructs, `signatures` reads constructors, `fields`
are their types, `typed` tells what was typed in vain, `messages` puts Hydra's errors in a line.
"""
