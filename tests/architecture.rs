//! The order of the modules in `src/lib.rs` is the order of the imports: arrows point down.

use std::{
    collections::BTreeSet,
    fs,
    path::{Path, PathBuf},
};

/// The modules in the table of `lib.rs`, from the top down.
fn modules() -> Vec<String> {
    let lib = fs::read_to_string("src/lib.rs").unwrap();
    let rows = lib.lines().filter_map(|line| line.strip_prefix("//! | [`"));
    rows.map(|row| row.split('`').next().unwrap().to_owned())
        .collect()
}

fn sources(folder: &Path, found: &mut Vec<PathBuf>) {
    for entry in fs::read_dir(folder).unwrap() {
        let path = entry.unwrap().path();
        if path.is_dir() {
            sources(&path, found);
        } else if path.extension().is_some_and(|it| it == "rs") {
            found.push(path);
        }
    }
}

/// The top-level modules that a text names as `crate::module` or `crate::{module, …}`,
/// wherever it does.
fn named_in(source: &str) -> BTreeSet<String> {
    let code = source.lines().map(|line| match line.find("//") {
        Some(comment) => &line[..comment],
        None => line,
    });
    let code: String = code.collect::<Vec<_>>().join("\n");
    let mut named = BTreeSet::new();
    for (at, found) in code.match_indices("crate::") {
        let rest = &code[at + found.len()..];
        match rest.strip_prefix('{') {
            Some(list) => named.extend(first_words(list)),
            None => named.extend(word(rest)),
        }
    }
    named
}

/// The first word of each item of a list that ends with its closing brace.
fn first_words(list: &str) -> Vec<String> {
    let mut words = Vec::new();
    let (mut depth, mut begin) = (1, 0);
    for (at, character) in list.char_indices() {
        match character {
            '{' => depth += 1,
            '}' => depth -= 1,
            _ => {}
        }
        if depth == 0 || depth == 1 && character == ',' {
            words.extend(word(list[begin..at].trim_start()));
            begin = at + 1;
        }
        if depth == 0 {
            break;
        }
    }
    words
}

fn word(text: &str) -> Option<String> {
    let end = text.find(|it: char| !it.is_alphanumeric() && it != '_');
    let word = &text[..end.unwrap_or(text.len())];
    (!word.is_empty()).then(|| word.to_owned())
}

#[test]
fn no_module_imports_one_above_it() {
    let modules = modules();
    let mut files = Vec::new();
    sources(Path::new("src"), &mut files);
    assert!(files.len() > 50, "{}", files.len());
    let mut wrong = Vec::new();
    let mut arrows = 0;
    for file in &files {
        let room = file.strip_prefix("src").unwrap().iter().next().unwrap();
        let room = Path::new(room).file_stem().unwrap().to_str().unwrap();
        // They stand above all, and beside.
        if ["lib", "main", "allocator", "fuzzing"].contains(&room) {
            continue;
        }
        let Some(own) = modules.iter().position(|it| it == room) else {
            wrong.push(format!("{room} is not in the table of src/lib.rs"));
            continue;
        };
        for named in named_in(&fs::read_to_string(file).unwrap()) {
            let Some(other) = modules.iter().position(|it| *it == named) else {
                continue;
            };
            arrows += usize::from(other != own);
            if other < own {
                wrong.push(format!("{}: {room} knows {named}", file.display()));
            }
        }
    }
    assert!(arrows > 100, "{arrows}");
    assert!(wrong.is_empty(), "{wrong:#?}");
}

#[test]
fn imports_are_seen_in_every_form() {
    let source = "use crate::{\n    a::{b, c},\n    d,\n};\nfn f() { crate::e::g() } // crate::h";
    let seen: Vec<_> = named_in(source).into_iter().collect();
    assert_eq!(seen, ["a", "d", "e"]);
}
