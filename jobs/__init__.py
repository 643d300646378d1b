"""The commands: each module is one subcommand's whole job; they may import everything below them."""
