"""Space Ranger's folders of every generation, Visium and Visium HD."""
