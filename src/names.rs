//! Enumerations whose values users choose by name. Each name is written once; flags, settings, messages and files all
//! use it.

/// An enumeration with a name for each value; implemented by `names!`.
pub trait Named: Copy + 'static {
    /// The names, in the order of declaration.
    const NAMES: &'static [&'static str];

    /// The value with this name or alias.
    fn named(name: &str) -> Option<Self>;
}

/// The message for a name that `T` does not have.
pub fn expected<T: Named>() -> String {
    format!("one of {} is expected", T::NAMES.join(", "))
}

/// Gives an enumeration without fields its names: `names!(Kind { Linear = "linear", Cosine = "cosine" |
/// "squaredcos_cap_v2" })`. Names after a bar are aliases: accepted, never written. Generates `ALL`, `name()`,
/// [`Named`], `Display` and `FromStr`.
macro_rules! names {
    ($type:ident { $($value:ident = $name:literal $(| $alias:literal)*),+ $(,)? }) => {
        impl $type {
            /// Every value, in the order of declaration.
            pub const ALL: [Self; [$($name),+].len()] = [$(Self::$value),+];

            /// Its name in flags, settings and files.
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
