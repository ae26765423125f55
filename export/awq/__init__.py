"""Channel scales: folded into what stands before a linear layer, so that its rounding loses less.

`scales.channel_scales` chooses them, `fold` puts them where they belong. The idea is AWQ's (Lin et al. 2023);
the choice differs by what rounds afterwards.
"""
