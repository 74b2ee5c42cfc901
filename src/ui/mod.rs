//! What a person or a script sees: progress, tables, prompts.

mod output;
mod prompt;
mod table;
mod terminal;

pub(crate) use output::{ContentOutput, all_was_printed, printed, say, say_line, tell};
pub use prompt::{ask_hidden, has_terminal};
pub use table::Table;
pub use terminal::{Style, Terminal};
