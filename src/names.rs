//! Enumerations that people choose from: each value's name is written once, and flags, settings, messages and files all
//! use it.

/// A type whose values have names; implemented by `names!`.
pub trait Named: Copy + 'static {
    /// The names, in the order of declaration.
    const NAMES: &'static [&'static str];

    /// The value of a name or of one of its aliases.
    fn named(name: &str) -> Option<Self>;
}

/// The sentence for a name that is none of `T`'s.
pub fn expected<T: Named>() -> String {
    format!("one of {} is expected", T::NAMES.join(", "))
}

/// Gives an enumeration without fields its names: `names!(Kind { Linear = "linear", Cosine = "cosine" |
/// "squaredcos_cap_v2" })`. What follows a bar is read too, never written. Makes `ALL`, `name()`, [`Named`], `Display`
/// and `FromStr`.
macro_rules! names {
    ($type:ident { $($value:ident = $name:literal $(| $alias:literal)*),+ $(,)? }) => {
        impl $type {
            /// All of them.
            pub const ALL: [Self; [$($name),+].len()] = [$(Self::$value),+];

            /// What flags, settings and files call it.
            pub const fn name(self) -> &'static str {
                match self {
                    $(Self::$value => $name),+
                }
            }
        }

        impl $crate::names::Named for $type {
            const NAMES: &'static [&'static str] = &[$($name),+];

            fn named(name: &str) -> Option<Self> {
                match name {
                    $($name $(| $alias)* => Some(Self::$value),)+
                    _ => None,
                }
            }
        }

        impl std::fmt::Display for $type {
            fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
                f.write_str(self.name())
            }
        }

        impl std::str::FromStr for $type {
            type Err = $crate::error::Error;

            fn from_str(name: &str) -> $crate::error::Result<Self> {
                <Self as $crate::names::Named>::named(name).ok_or_else(|| {
                    $crate::error::Error::Usage(format!("`{name}`: {}", $crate::names::expected::<Self>()))
                })
            }
        }
    };
}
pub(crate) use names;

#[cfg(test)]
mod tests {
    #[derive(Clone, Copy, Debug, PartialEq)]
    enum Fruit {
        Apple,
        Pear,
    }

    names!(Fruit { Apple = "apple" | "malus", Pear = "pear" });

    #[test]
    fn names_are_written_and_read() {
        assert_eq!(Fruit::ALL.map(|fruit| fruit.to_string().parse::<Fruit>().unwrap()), Fruit::ALL);
        assert_eq!("malus".parse::<Fruit>().unwrap(), Fruit::Apple);
        let refusal = "plum".parse::<Fruit>().unwrap_err().to_string();
        assert_eq!(refusal, "`plum`: one of apple, pear is expected");
    }
}
