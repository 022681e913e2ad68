//! The parser on text of every kind: what it takes, what it refuses and how, and that it never panics.

use cuda_emu::ptx::{Image, Limits, ParseErrorKind, link, parse, parse_for};

const HEAD: &str = ".version 8.0\n.target sm_80\n.address_size 64\n";

fn kernel(body: &str) -> String {
    format!(
        "{HEAD}.visible .entry k(.param .u64 p)\n{{\n.reg .pred %p<4>;\n.reg .b16 %rs<4>;\n.reg .b32 %r<9>;\n\
         .reg .b64 %rd<9>;\n.reg .f32 %f<9>;\n{body}\nret;\n}}\n"
    )
}

fn refused(text: &str) -> (u32, String) {
    let error = parse(text).map(|_| ()).expect_err(text);
    (error.line, error.message)
}

#[test]
fn versions_and_targets_are_refused_as_the_driver_does() {
    let limits = Limits { version: (8, 0), target: 80 };
    let kind = |text: &str| parse_for(text, limits).map(|_| ()).map_err(|error| (error.kind, error.line));
    assert_eq!(kind(".version 8.0\n.target sm_80\n.address_size 64\n"), Ok(()));
    assert_eq!(kind(".version 7.8\n.target sm_52, debug\n"), Ok(()));
    assert_eq!(kind("// c\n.version 8.1\n.target sm_80\n"), Err((ParseErrorKind::Version, 2)));
    assert_eq!(kind(".version 8.0\n.target sm_90\n"), Err((ParseErrorKind::Target, 2)));
    assert_eq!(kind(".version 8.0\n.target sm_80a\n"), Ok(()));
    assert_eq!(kind(".target sm_80\n"), Err((ParseErrorKind::Invalid, 1)));
    assert_eq!(ParseErrorKind::Version.code(), 222);
}

#[test]
fn what_is_outside_is_refused_by_name_and_line() {
    for (body, name) in [
        ("tex.2d.v4.f32.f32 {%f1,%f2,%f3,%f4}, [t, {%f1,%f2}];", "tex.2d"),
        ("wgmma.fence.sync.aligned;", "wgmma.fence"),
        ("mbarrier.try_wait.shared.b64 %p1, [%r1], %rd1;", "mbarrier.try_wait"),
        ("vadd.s32.s32.s32 %r1, %r2, %r3;", "vadd"),
        ("elect.sync %r1|%p1, %r2;", "elect.sync"),
        ("shfl.down.b32 %r1, %r2, 1, 31;", "shfl.down"),
        ("add.f128 %r1, %r2, %r3;", "add.f128"),
        ("alloca.u64 %rd1, 8;", "alloca"),
    ] {
        let (line, message) = refused(&kernel(body));
        assert!(line == 11 && message.contains(name) && message.contains("not supported"), "line {line}: {message}");
    }
}

#[test]
fn mistakes_have_their_line() {
    for (body, part) in [
        ("add.s32 %r1, %r2;", "add.s32"),
        ("add.s32 %r1, %r2, %rd1;", "64 bits"),
        ("add.s32 %r1, %r2, %nobody;", "%nobody"),
        ("bra nowhere;", "nowhere"),
        ("ld.global.f32 %f1, [%r1];", "64 bits"),
        ("ld.shared.f32 %f1, [nothing];", "nothing"),
        ("@%r1 bra x;", "not a predicate"),
        ("mov.u32 %r1, 5", "';'"),
        ("st.param.u32 [p], %r1;", "cannot be written"),
        ("call.uni missing;", "missing"),
        ("mov.b32 %r1, {%rs1, %rs2, %rs3};", "3 parts"),
        ("bar.sync;", "barrier"),
        ("cp.async.ca.shared.global [%r1], [%rd1], 12;", "12 bytes"),
    ] {
        let (line, message) = refused(&kernel(body));
        assert!((11..=12).contains(&line) && message.contains(part), "{body}: line {line}: {message}");
    }
}

#[test]
fn calls_by_address_are_checked_when_they_are_loaded() {
    let functions = ".func (.param .b32 r) f(.param .b32 x) { st.param.b32 [r], 1; ret; }\n\
                     .func g(.param .b64 x) { ret; }\n.entry other() { ret; }\n";
    let with = |body: &str| kernel(body).replacen(".visible", &format!("{functions}.visible"), 1);
    let proto = ".param .b32 a; .param .b32 b; proto: .callprototype (.param .b32 _) _ (.param .b32 _);";
    let good = [
        format!("{proto} mov.u64 %rd1, f; call (b), %rd1, (a), proto;"),
        "none: .callprototype ()_ (); call %rd1, (), none; call %rd1, none; call.uni %rd1, (), none;".into(),
        "bare: .callprototype _; call %rd1, bare;".into(),
        "{ .param .align 8 .b8 s[16]; big: .callprototype (.param .align 8 .b8 _[16]) _ () .noreturn; \
         call (s), %rd1, big; }"
            .into(),
        ".param .b32 a; .param .b32 b; list: .calltargets f, f; call (b), %rd1, (a), list;".into(),
        "setp.eq.u64 %p1, %rd1, g;".into(),
    ];
    for body in good {
        parse(&with(&body)).unwrap_or_else(|error| panic!("{body}: {error}"));
    }
    for (body, part) in [
        ("mov.u32 %r1, f;", "the address of function f needs 64 bits"),
        ("mov.u64 %rd1, f+4;", "4 bytes inside function f"),
        ("ld.global.u32 %r1, [f];", "f is a function, not a variable"),
        ("mov.u64 %rd1, other;", "other is a kernel, whose address device code cannot use"),
        ("mov.u64 %rd1, k;", "k is a kernel, whose address device code cannot use"),
        ("call other, ();", "other is a kernel, which can be launched, but not called"),
        ("call %rd1, ();", "a call by address needs"),
        ("call %rd1, (), nothing;", "no .callprototype or .calltargets nothing stands above the call"),
        ("{ none: .callprototype _; } call %rd1, none;", "no .callprototype or .calltargets none stands above"),
        (&format!("{proto} call %rd1, (a), proto;"), "proto has 1 results and 1 parameters, the call 0 and 1"),
        (&format!("{proto} call (b), f, (a), proto;"), "f is called by its name"),
        (&format!("{proto} call (b), %r1, (a), proto;"), "a register of 32 bits"),
        ("list: .calltargets f, g;", "g takes 8 bytes and returns nothing, but f of the same list takes 4 bytes"),
        ("list: .calltargets missing;", "function missing is not defined"),
        ("wrong: .callprototype (.reg .b32 _) _;", ".param"),
        ("wrong: .callprototype name (.param .b32 _);", "an underscore"),
    ] {
        let message = parse(&with(body)).map(|_| ()).expect_err(body).message;
        assert!(message.contains(part), "{body}: {message}");
    }
    let variables = |init: &str| parse(&format!("{HEAD}{functions}.global .u64 t[2] = {{{init}}};")).map(|_| ());
    assert_eq!(variables("f, g"), Ok(()));
    assert_eq!(variables("generic(f), 0"), Ok(()));
    for (init, part) in [
        ("f+8", "8 bytes inside function f"),
        ("other", "other is a kernel"),
        ("missing", "missing in an initialiser is no variable or function"),
    ] {
        let message = variables(init).expect_err(init).message;
        assert!(message.contains(part), "{init}: {message}");
    }
}

#[test]
fn scopes_hide_registers_and_labels() {
    let body = "
        { .reg .b32 %r1; mov.u32 %r1, 7; L: add.s32 %r1, %r1, 1; bra M; M: }
        {.reg.b16 glued, p; mov.b16 glued,0X1F79U; mov.b16 p, glued;}
        { .reg .b64 low,high; mov.b64 low, 1; mov.b64 high, low; bra L; L: }
        mov.b64 {%r1, _}, %rd1; mov.b64 %rd1, {%r1, %r2}; mov.f32 %f1, 0f3F800000; mov.f32 %f2, 1.5; mov.f32 %f2, -1e-3;
        setp.lt.s32 %p1|%p2, %r1, -5; @!%p1 add.s32 %r1, %r1, WARP_SZ; mov.u32 %r2, %tid.x;";
    let module = parse(&kernel(body)).unwrap_or_else(|error| panic!("{error}"));
    assert_eq!(module.kernels[0].name, "k");
    assert!(module.kernels[0].registers < 16, "registers are reused: {}", module.kernels[0].registers);
}

#[test]
fn declarations_are_laid_out() {
    let text = format!(
        "{HEAD}
        .const .align 4 .f32 c[3] = {{1.0, 0f40000000, 3}};
        .global .align 8 .u64 table[2] = {{generic(c), c+4}};
        .global .v2 .f32 pair;
        .shared .align 4 .b8 small[6];
        .extern .shared .align 16 .b8 dynamic[];
        .entry k(.param .u8 a, .param .align 8 .b8 b[12], .param .u64 c_p, .param .u16 d)
        .maxntid 32, 4, 1 .minnctapersm 2 {{
            .reg .b32 %r<3>; .reg .b64 %rd<3>; .shared .align 8 .b8 big[24]; .local .align 16 .b8 depot[20];
            mov.u32 %r0, small; mov.u32 %r1, big; mov.u32 %r2, dynamic; mov.u64 %rd0, depot; ret; }}"
    );
    let module = parse(&text).unwrap_or_else(|error| panic!("{error}"));
    let kernel = &module.kernels[0];
    let params: Vec<_> = kernel.params.iter().map(|p| (p.offset, p.bytes)).collect();
    assert_eq!(params, [(0, 1), (8, 12), (24, 8), (32, 2)]);
    assert_eq!((kernel.param_bytes, kernel.static_shared, kernel.local_bytes), (34, 32, 24));
    assert_eq!((kernel.max_threads, kernel.min_blocks), (Some([32, 4, 1]), Some(2)));
    let c = &module.globals[0];
    assert_eq!((c.bytes, c.init.len()), (12, 12));
    assert_eq!(c.init[..8], [0, 0, 128, 63, 0, 0, 0, 64]);
    assert_eq!(module.globals[1].relocations, [(0, 0, 0), (8, 0, 4)]);
    assert_eq!((module.globals[2].bytes, module.globals[2].align), (8, 8));
}

#[test]
fn recursion_and_undefined_calls_are_refused() {
    let text = format!("{HEAD}.func f() {{ call.uni f; ret; }} .entry k() {{ call.uni f; ret; }}");
    assert!(refused(&text).1.contains("calls itself"));
    let text = format!(
        "{HEAD}.extern .func malloc(.param .b64 n); .entry k() {{ .param .b64 n; call.uni malloc, (n); ret; }}"
    );
    assert!(refused(&text).1.contains("malloc"));
}

struct Random(u64);

impl Random {
    fn below(&mut self, n: usize) -> usize {
        self.0 = self.0.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (self.0 >> 33) as usize % n.max(1)
    }
}

/// What texts are broken with, before what each test adds.
const MARKS: &[&str] = &["{", "}", "(", ")", "[", "]", ";", ","];

/// Real PTX with bytes, words and lines removed, doubled, swapped and replaced: an error or a module, and no panic.
#[test]
fn no_text_makes_the_parser_panic() {
    let sources =
        [include_str!("kernels/control.ptx"), include_str!("kernels/mma_gemm.ptx"), include_str!("kernels/basic.ptx")];
    let rest: &[&str] = &[
        "@",
        "!",
        "|",
        ".",
        "%",
        "\"",
        "/*",
        "//",
        "-",
        "+",
        "<",
        ">",
        "0x",
        "99999999999999999999",
        "0f",
        "0d1",
        "1e",
        "_",
        "%p",
        "%r1",
        ".reg",
        ".param",
        ".local .b8 x[999999999999];",
        ".reg .b32 %z<4294967295>;",
        "é",
        "\0",
        ".v4",
        "ld.global.v4.f64",
        "bra",
        "call",
        "\u{2028}",
        ".align 3",
        "18446744073709551615",
        "-9223372036854775808",
        "ret;",
        "exit;",
        "mov.b64",
        ".func",
        ".entry k() {",
        "wmma.load.a.sync.aligned.row.m16n16k16.f16",
        "cvt",
        "setp.",
    ];
    let scraps = [MARKS, rest].concat();
    let mut random = Random(1);
    let (mut taken, mut refused) = (0, 0);
    for round in 0..1500 {
        let text = sources[round % sources.len()];
        // A piece of the text keeps a round short.
        let lines: Vec<&str> = text.lines().collect();
        let mut text: String = if round % 3 == 0 {
            text.to_string()
        } else {
            let start = random.below(lines.len());
            format!("{HEAD}{}", lines[start..(start + 1 + random.below(200)).min(lines.len())].join("\n"))
        };
        for _ in 0..1 + random.below(3) {
            let mut at = random.below(text.len());
            while !text.is_char_boundary(at) {
                at -= 1;
            }
            let mut end = (at + random.below(30)).min(text.len());
            while !text.is_char_boundary(end) {
                end -= 1;
            }
            let end = end.max(at);
            match random.below(4) {
                0 => text.replace_range(at..end, ""),
                1 => text.insert_str(at, scraps[random.below(scraps.len())]),
                2 => {
                    let piece = text[at..end].to_string();
                    text.insert_str(at, &piece);
                }
                _ => text.replace_range(at..end, scraps[random.below(scraps.len())]),
            }
        }
        match parse(&text) {
            Ok(_) => taken += 1,
            Err(error) => {
                assert!(error.line as usize <= text.lines().count() + 1 && !error.message.is_empty(), "{error}");
                refused += 1;
            }
        }
    }
    assert!(taken > 3 && refused > 100, "{taken} taken, {refused} refused: the mutations are too wild or too tame");
}

/// Deep nesting and long chains of calls end in an error, not in a full stack.
#[test]
fn deep_texts_are_refused_in_time() {
    let deep = format!("{HEAD}.entry k() {{ {} }}", "{".repeat(100_000));
    assert!(refused(&deep).1.contains("a function has no closing brace"));
    let vector = kernel(&format!("mov.b32 %r1, {}", "{".repeat(100_000)));
    assert!(refused(&vector).1.contains("operands nested too deep"));
    let lists = format!("{HEAD}.global .b8 x[4] = {}", "{".repeat(100_000));
    assert!(refused(&lists).1.contains("an initialiser nested more than eight deep"));
    let mut chain = HEAD.to_string();
    chain.push_str(".func f0() { ret; }\n");
    for i in 1..2000 {
        chain.push_str(&format!(".func f{i}() {{ call.uni f{}; call.uni f{}; ret; }}\n", i - 1, i - 1));
    }
    chain.push_str(".entry k() { call.uni f1999; ret; }");
    assert!(refused(&chain).1.contains("calls more than"));
    let mut doubled = HEAD.to_string();
    doubled.push_str(".func f0() { .reg .b32 %r<2>; add.s32 %r0, %r1, %r1; ret; }\n");
    for i in 1..40 {
        doubled.push_str(&format!(".func f{i}() {{ call.uni f{}; call.uni f{}; ret; }}\n", i - 1, i - 1));
    }
    doubled.push_str(".entry k() { call.uni f39; ret; }");
    assert!(refused(&doubled).1.contains("instructions with all calls in line"));
}

#[test]
fn a_definition_has_the_parameters_that_were_declared() {
    let module = |defined: &str| {
        format!(
            "{HEAD}.func (.param .b32 o) f(.param .b32 a);\n.visible .entry k()\n{{\n.param .b32 a;\n.param .b32 b;\n\
             st.param.b32 [a], 1;\n\
             call (b), f, (a);\nret;\n}}\n.func {defined}\n"
        )
    };
    assert!(parse(&module("(.param .b32 o) f(.param .b32 x)\n{ st.param.b32 [o], 1; ret; }")).is_ok());
    for wrong in [
        "(.param .b32 o) f(.param .b32 x, .param .b32 y)\n{ .reg .b32 %r; ld.param.b32 %r, [y]; ret; }",
        "(.param .b32 o) f(.param .b64 x)\n{ ret; }",
        "f(.param .b32 o, .param .b32 x)\n{ ret; }",
        "(.param .b32 o) f(.param .b64 x);",
    ] {
        let (line, message) = refused(&module(wrong));
        assert_eq!(line, 13);
        assert!(message.contains("f was declared with other parameters"), "{message}");
    }
}

/// Whatever stands in the images, linking ends with a text or an error, and so does parsing that text.
#[test]
fn no_images_make_the_linker_panic() {
    let caller = format!(
        "{HEAD}.extern .global .align 4 .b32 t[4];\n.global .u32 own, other = 1;\n\
         .extern .func (.param .b32 o) f(.param .b32 a, .param .align 8 .b8 x[16]);\n.weak .func w() {{ ret; }}\n\
         .visible .entry k()\n{{\n.param .b32 a;\n.param .b32 b;\n.param .align 8 .b8 x[16];\n\
         call (b), f, (a, x);\ncall w;\nret;\n}}\n"
    );
    let callee = format!(
        "{HEAD}.visible .global .align 4 .u32 t[4] = {{1, 2, 3, 4}};\n.global .u32 own;\n.extern .shared .b8 s[];\n\
         .visible .func w() {{ ret; }}\n.visible .func f(.param .b32 a, .param .align 8 .b8 x[16])\n{{\n\
         .reg .b32 %r;\nld.param.b32 %r, [a];\nret;\n}}\n"
    );
    let images = |caller: &str, callee: &str| {
        let linked = link(&[Image { name: "a", text: caller }, Image { name: "b", text: callee }]);
        linked.and_then(|text| parse(&text)).is_ok()
    };
    assert!(images(&caller, &callee) && images(&callee, &caller));
    let huge = |text: &str| text.replace("x[16]", "x[4294967295]");
    assert!(!images(&huge(&caller), &huge(&callee)));
    let rest: &[&str] = &[
        "=",
        ".param",
        ".align",
        ".extern",
        ".weak",
        ".visible",
        ".func",
        ".entry",
        ".global",
        ".shared",
        ".section",
        ".file",
        ".pragma",
        ".target",
        ".version",
        "/*",
        "//",
        "\"",
        "t",
        "f",
        "w",
        "own",
        "99999999999999999999",
        "é",
        "\0",
    ];
    let scraps = [MARKS, rest].concat();
    let mut random = Random(7);
    let mut taken = 0;
    for _ in 0..4000 {
        let mut texts = [caller.clone(), callee.clone()];
        for _ in 0..1 + random.below(2) {
            let text = &mut texts[random.below(2)];
            let mut at = random.below(text.len());
            while !text.is_char_boundary(at) {
                at -= 1;
            }
            let mut end = (at + random.below(12)).min(text.len());
            while !text.is_char_boundary(end) {
                end += 1;
            }
            let scrap = scraps[random.below(scraps.len())];
            text.replace_range(at..end, if random.below(2) == 0 { "" } else { scrap });
        }
        taken += u32::from(images(&texts[0], &texts[1]));
    }
    assert!((10..3990).contains(&taken), "{taken} of 4000 taken: the mutations are too wild or too tame");
}
