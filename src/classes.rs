//! Classes of data, a model and a classifier: where both sides have names, the same class has the same name.

/// Whether the names say no more than the numbers: there are none, or they are the numbers, as of labels in an array.
fn are_numbers(names: &[String]) -> bool {
    names.iter().enumerate().all(|(k, name)| *name == k.to_string())
}

/// Whether the labels of data whose classes are called `of_data` are found by name among a model's classes `of_model`,
/// and not by number. Names that are numbers, as of the folders 3 and 7, are those of digits, whose names are their
/// numbers; words are not.
pub fn go_by_name(of_data: &[String], of_model: &[String]) -> bool {
    let words = of_data.iter().any(|name| name.parse::<u64>().is_err());
    let by_number = are_numbers(of_data) || of_model.is_empty() || (words && are_numbers(of_model));
    !by_number
}

/// The first class that two networks call differently, if both have names for their classes.
pub fn first_difference(a: &[String], b: &[String]) -> Option<usize> {
    let named = !are_numbers(a) && !are_numbers(b);
    a.iter().zip(b).position(|(a, b)| named && a != b)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn named(names: &str) -> Vec<String> {
        names.split_whitespace().map(String::from).collect()
    }

    #[test]
    fn labels_go_by_name_where_both_sides_have_names() {
        for (of_data, of_model, by_name) in [
            ("cat dog", "dog cat", true),
            ("cat dog 2", "dog cat", true),
            ("cat dog", "", false),
            ("cat dog", "0 1", false),
            ("0 1", "cat dog", false),
            ("0 1", "3 7", false),
            ("3 7", "0 1 2 3 4 5 6 7 8 9", true),
            ("", "cat dog", false),
        ] {
            assert_eq!(go_by_name(&named(of_data), &named(of_model)), by_name, "{of_data}, {of_model}");
        }
    }

    #[test]
    fn names_in_another_order_differ() {
        for (a, b, first) in [
            ("cat dog", "cat dog", None),
            ("cat dog owl", "cat owl dog", Some(1)),
            ("cat dog", "0 1", None),
            ("", "cat dog", None),
            ("cat", "cat dog", None),
        ] {
            assert_eq!(first_difference(&named(a), &named(b)), first, "{a}, {b}");
        }
    }
}
